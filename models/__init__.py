"""Models, and what of them options can name. Imports no torch; the modules in here do."""

SCHEMES = ("timm", "xavier", "kaiming", "mimetic")  # random initialisations
