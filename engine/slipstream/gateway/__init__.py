"""Floor 4. Agents of any framework, trained through the HTTP interface they already speak."""
