"""Spellings that existing caches contain, where the code uses another word. They must never change.

Renaming one would encode every dataset again.
"""

STORED_STD = "deviation"
"""Tensor name of the posterior's std in cached latents; an image encoder returns it as "std"."""
POSTERIOR_MOMENTS = "mean and deviation"
"""Part of the hashed identity of a latents folder whose entries hold the posterior's mean and std."""
FLIPPED_SUFFIX = " mirrored"
"""Appended to the geometry in the hashed key of a flipped image's latents."""
