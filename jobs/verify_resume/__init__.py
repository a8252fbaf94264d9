"""Is interrupted training bit for bit the uninterrupted one?"""
