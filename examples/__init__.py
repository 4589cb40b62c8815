"""Programs that show fastclip at work."""
