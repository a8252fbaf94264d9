"""A settings file: JSON -> Settings, validated once."""
