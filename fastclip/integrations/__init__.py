"""fastclip inside other toolkits: a module for each, to be imported beside it. None of them is imported by fastclip."""
