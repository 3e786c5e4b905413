"""The protocols over HTTP: OpenAI's and Anthropic's, as their clients speak them."""
