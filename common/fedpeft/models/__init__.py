"""Backbones: pre-trained models, their checkpoints and their fingerprints."""
