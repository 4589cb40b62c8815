"""One recipe per trainer: what to write to let fastclip clip, and what to switch off."""
