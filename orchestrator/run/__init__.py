"""What one can do with a whole run: launch, control, test, export, repair, collect garbage."""
