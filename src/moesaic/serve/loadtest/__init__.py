"""Load for any server that speaks OpenAI's protocol, and what its users would feel."""
