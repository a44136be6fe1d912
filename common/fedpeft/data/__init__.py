"""Data: sources, label maps, transforms, partitions."""
