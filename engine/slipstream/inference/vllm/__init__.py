"""Floor 4. Inference by vLLM servers: their HTTP contract, weights with proof, and one server's life."""
