"""Draw the masks for vision transformers: `python masks/vit_masks.py`."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not this folder
    from bsa_vision.masks.vit_masks import main

    main()
