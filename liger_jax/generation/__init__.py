"""Generation: turns prompts into tokens, and tokens into text."""
