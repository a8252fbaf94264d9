"""Claims, the ratchet and chains in the database: the only package that imports SQLAlchemy."""
