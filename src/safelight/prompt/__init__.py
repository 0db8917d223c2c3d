"""From the words of a prompt to tokens."""
