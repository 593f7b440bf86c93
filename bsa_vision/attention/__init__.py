"""One attention call: what it may contain, how it is checked, packed, run and given back."""
