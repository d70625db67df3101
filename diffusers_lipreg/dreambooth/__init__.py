"""Share what both training scripts do as the official ones.

What a user can mend raises `errors.RunError` from everywhere in here. Loaders raise `ValueError` where their caller knows
the flag that is to blame; the block of `models.loading_errors` that it is in names the flag.
"""
