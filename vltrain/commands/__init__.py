"""Commands that have a page of their own, and the options that several commands take."""
