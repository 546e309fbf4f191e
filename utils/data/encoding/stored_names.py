"""Spellings that existing caches and run folders contain, where the code uses another word. They must never change.

Renaming one would encode every dataset again, or make the evaluations of earlier runs unreadable.
"""

STORED_STD = "deviation"
"""Tensor name of the posterior's std in cached latents; an image encoder returns it as "std"."""
POSTERIOR_MOMENTS = "mean and deviation"
"""Part of the hashed identity of a latents folder whose entries hold the posterior's mean and std."""
FLIPPED_SUFFIX = " mirrored"
"""Appended to the geometry in the hashed key of a flipped image's latents."""
EVALUATION_FINGERPRINT = "panel"
"""Field of evaluations.jsonl: the fingerprint of the evaluation points."""
EVALUATION_NUM_IMAGES = "num_pictures"
"""Field of evaluations.jsonl: the number of images of a group."""
