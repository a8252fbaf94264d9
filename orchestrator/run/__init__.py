"""Operations on a whole run: launch, control, test, export, repair, collect garbage."""
