"""Floor 4. A language model as judge: by a rubric, over OpenAI's interface, never trained.

rubric.py      what is asked, and what each verdict is worth
prompts.py     an episode as text, and what the judge is told
answers.py     what is read in a judge's answer, and what makes it none
client.py      one answer of a server
judge.py       verdicts: with a deadline, tried again, kept; as metrics and rewards
agreement.py   how far verdicts agree with outcomes
"""
