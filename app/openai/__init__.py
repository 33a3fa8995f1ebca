"""OpenAI's images API over the same engine: prompts that are classes, its errors, its events."""
