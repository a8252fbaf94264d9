"""Check that interrupted training equals uninterrupted training, bit for bit."""
