"""Parts of run files that many tests share."""

TINY_MODEL = """[model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = 32
depth = 1
classes = ["cat", "dog"]"""
"""One block of a small transformer, for images of 32 x 32 pixels in two classes."""
