"""Floor 4. Ways of weights from the learner to those who sample: both ends of each way in one file."""
