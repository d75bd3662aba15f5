"""A taskset for the real verifiers: a toolset with state, a reward and a metric."""

# Its annotations are read at run time.
from collections.abc import Iterable

import verifiers.v1 as vf

MEANINGS = {"cat": "a small animal", "dog": "a loyal animal"}


class WordData(vf.TaskData):
    answer: str


class Notes(vf.State):
    looked: int = 0


class DictionaryConfig(vf.ToolsetConfig):
    pass


class Dictionary(vf.Toolset[DictionaryConfig, Notes]):
    @vf.tool
    def look_up(self, word: str) -> str:
        """Look a word up."""
        self.state.looked += 1
        return MEANINGS[word]


class WordConfig(vf.TaskConfig):
    dictionary: DictionaryConfig = DictionaryConfig()


class WordTask(vf.Task[WordData, Notes, WordConfig]):
    @classmethod
    def toolsets(cls, config: WordConfig) -> list[vf.Toolset]:
        return [Dictionary(config.dictionary)]

    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        last = trace.nodes[-1].message
        return float(last.role == "assistant" and last.content == self.data.answer)

    @vf.metric
    async def looked(self, trace: vf.Trace) -> float:
        return float(trace.state.looked)

    @vf.stop
    async def curious(self, trace: vf.Trace) -> bool:
        return trace.state.looked >= 3


class WordsConfig(vf.TasksetConfig):
    task: WordConfig = WordConfig()
    count: int = 60


class Words(vf.Taskset[WordTask, WordsConfig]):
    def load(self) -> Iterable[WordTask]:
        for n in range(self.config.count):
            word = ("cat", "dog")[n % 2]
            prompt = f"What is a {word} ? ({n})"
            yield WordTask(WordData(prompt=prompt, answer=MEANINGS[word]), self.config.task)
