"""Code that turns examples into batches on the device: feeds, splits, random state, images."""
