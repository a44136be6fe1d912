"""Sources of images and labels: parquet files, image folders, index files."""
