"""Floor 4. Tools: what an environment lets the policy call."""
