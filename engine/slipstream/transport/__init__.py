"""Floor 4. How actors and the learner reach the hub: over ZeroMQ, or in memory."""
