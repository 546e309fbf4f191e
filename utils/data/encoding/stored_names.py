"""Names that existing caches have on disk, where the code uses another word. They must never change."""

STORED_STD = "deviation"
"""The standard deviation of the posterior in the entries of the latents cache; "std" in an image encoder's items."""
POSTERIOR_MOMENTS = "mean and deviation"
"""Part of the name of a latents cache that holds mean and standard deviation; hashed."""
