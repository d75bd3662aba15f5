"""Floor 5. The page: HTML, CSS and JavaScript as they are written, without a build."""
