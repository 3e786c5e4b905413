"""Tool calls as the families' templates write them: read from text as it comes, asked for by grammars and prompts."""
