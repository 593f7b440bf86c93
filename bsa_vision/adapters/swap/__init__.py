"""How an attention module is swapped and put back."""
