"""Settings: reading, validating, changing and comparing them."""
