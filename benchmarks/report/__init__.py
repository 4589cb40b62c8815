"""Tables and pictures, from result files alone: nothing here needs torch or fastclip."""
