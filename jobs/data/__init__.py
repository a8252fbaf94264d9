"""How examples become batches on the device: feeds, splits, random state, images."""
