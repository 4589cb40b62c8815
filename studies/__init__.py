"""Research that fastclip was used for. Nothing else needs it."""
