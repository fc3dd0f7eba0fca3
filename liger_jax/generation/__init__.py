"""Generation: from prompts to tokens, and from tokens to text."""
