"""Command lines: options, presets, and errors that say what would be right."""
