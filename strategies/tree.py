"""Propose, score, allocate: the part of every tree search that is not its idea.

    propose   for every node some continuations, each a job of its own on the node's path, all at the same time
    score     what the reward model says of them: one batch for the whole expansion
    allocate  the strategy's business: which nodes to go on from, and with how many proposals

Steps end at blank lines. One that closes the thinking runs on to the end, so a complete solution is a leaf. Siblings
with the same text are one node with a `count`. At the depth limit a proposal is written to the end. Whatever ends the
search (a limit of its own, the request's tokens or time, the loss of the reward model), `answer` makes the best of what
is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

from thinkserve.strategies.engine import Answer, Delta, Emit, Engine, Event, Finish, Path, StoppedBy, Task
from thinkserve.strategies.errors import LOST
from thinkserve.strategies.pieces import Transcript
from thinkserve.strategies.rewards import UNREAD, RewardOptions, aggregated, cleaned, solution_steps, unread
from thinkserve.strategies.seeds import successor
from thinkserve.strategies.single import STOPPED_BY
from thinkserve.strategies.together import together
from thinkserve.strategies.tree_budget import Limits, Spent, answer_room
from thinkserve.strategies.tree_node import Node, slots
from thinkserve.strategies.tree_write import Allowance, Draft, Writer

# Why a search may not go on, where it is neither the request's end nor a limit.
REWARDS = "rewards"
GREEDY = "greedy sampling makes all proposals equal; each node gets one"


class Tree:
    """The nodes of one search, what they cost, and whether it may go on.

    `logprobs` asks the engine for log-probabilities. Nodes are numbered in the order in which they are made: `numbers`.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        emit: Emit,
        limits: Limits,
        rewards: RewardOptions = RewardOptions(),
        *,
        logprobs: bool = False,
    ) -> None:
        self.task, self.engine, self.emit, self.limits = task, engine, emit, limits
        self.spent = Spent()
        self.warnings: list[str] = []
        self.ended: Finish | None = None
        # What kept this search, or a branch of it, from going on; and whether proposals were left out to keep a limit.
        self._refused: str | None = None
        self.curtailed = False
        self.root = Node(0, None, task.seed, left=limits.path)
        self.nodes = [self.root]
        self._rewards = rewards
        self._writer = Writer(task, engine, logprobs=logprobs)
        self._numbers = count(1)

    async def start(self) -> Node:
        """The root, announced."""
        await self.emit(Event("node.created", 0, {"node": 0, "parent": None, "depth": 0, "tokens": 0}))
        return self.root

    @property
    def over(self) -> str | None:
        """Why the search may not go on: the request has ended, one of its own limits is reached, rewards are lost."""
        return self.ended or self._refused or self.spent.over(self.limits)

    @property
    def ends(self) -> list[Node]:
        """Nodes behind which nothing has been written, though it may have been tried; dead ends for want of others."""
        inner = {node.parent for node in self.nodes}
        ends = [node for node in self.nodes if node not in inner]
        return [node for node in ends if not node.dead] or ends

    @property
    def solutions(self) -> list[Node]:
        """All complete solutions, passed over or not, each as often as it was written."""
        return slots([node for node in self.nodes if node.terminal])

    def value(self, node: Node) -> float:
        """The rewards of a path as one number."""
        return aggregated(node.rewards, self._rewards.aggregate)

    def branches(self, searches: int) -> list[Tree]:
        """Searches that go on side by side from nodes of this one, each with its share of what is left."""
        trees, first = list[Tree](), next(self._numbers)
        for index in range(searches):
            tree = Tree(self.task, self.engine, self.emit, self.limits.share(self.spent, searches), self._rewards)
            # Numbers that do not depend on who is faster, none of them twice.
            tree._numbers = count(first + index, searches + 1)
            tree.ended, tree._refused = self.ended, self._refused
            trees.append(tree)
        self._numbers = count(first + searches, searches + 1)
        return trees

    def join(self, other: Tree) -> None:
        """Take in what a branch has spent and how it ended."""
        self._refused = self._refused or other._refused
        self.curtailed = self.curtailed or other.curtailed
        self.spent.add(other.spent)
        self.warnings += [text for text in other.warnings if text not in self.warnings]
        self.ended = self.ended or other.ended
        self.nodes += other.nodes[1:]

    async def expand(self, counts: Mapping[Node, int]) -> list[Node]:
        """Propose, and have the proposals scored: those of a node in one batch, while others may still be written."""
        return await self.propose(counts, scored=True)

    async def propose(self, counts: Mapping[Node, int], *, scored: bool = False) -> list[Node]:
        """Children for each node, `counts` of them at most, all written at the same time; duplicates are merged.

        A proposal that fails is a warning. Raises EngineDead, and EngineFailed when all proposals of the root fail.
        """
        if over := self.over:
            self._refused = over
            return []
        left = self.limits.tokens - self.limits.reserve - self.spent.tokens
        drafts = self._drafts(counts, left)
        siblings: dict[Node, list[Draft]] = {}
        for draft in drafts:
            siblings.setdefault(draft.parent, []).append(draft)
        for node, proposals in siblings.items():
            self.spent.expansions += 1
            await self.emit(Event("node.expanded", None, {"node": node.id, "proposals": len(proposals)}))

        async def grow(mine: Sequence[Draft]) -> list[Node]:
            await self._write(mine, left // len(drafts))
            failed = [draft.error for draft in mine if draft.error is not None]
            if len(failed) == len(mine) and mine[0].parent is self.root:
                raise failed[0]
            children = await self._children(mine)
            if scored:
                await self.score(children)
            return children

        grown = await together(grow, siblings.values())
        # In an order that does not depend on who is faster.
        self.nodes.sort(key=lambda node: node.id)
        return [child for children in grown for child in children]

    async def score(self, nodes: Sequence[Node]) -> None:
        """Rewards of the nodes' own steps, in one batch; those of the parents without text, time or a reward model.

        Raises what the reward model's failure raises where `on_reward_error` is "fail".
        """
        for node in nodes:
            node.rewards = () if node.parent is None else node.parent.rewards
        wanted = [node for node in nodes if node.steps]
        if not wanted or self.ended is not None:
            return
        try:
            scores = await self.engine.score(self.task.question, [Path(n.path, len(n.rewards)) for n in wanted])
        except TimeoutError:
            self.ended = "deadline"
            return
        except LOST as error:
            self.warn(self._rewards.lose(error))
            self._refused = REWARDS
            return
        self.spent.passes += len(wanted)
        if unread(scores):
            self.warn(UNREAD)
        for node, score in zip(wanted, scores, strict=True):
            node.rewards += cleaned(score.rewards)
            await self.emit(Event("node.scored", None, {"node": node.id, "reward": round(self.value(node), 4)}))

    async def finish(self, node: Node) -> Node:
        """A complete solution behind `node`, or behind its nearest ancestor that leaves room for an answer.

        Written in one go, thinking ended in time. `node` itself when it is complete, or when nothing more may be spent.
        """
        left = self.limits.tokens - self.spent.tokens
        if node.terminal or self.ended is not None or left <= 0:
            return node
        room = min(left, answer_room(min(self.limits.path, left)) + len(self.engine.info().think_close))
        start = node
        while start.parent is not None and (not start.open or start.left < room):
            start = start.parent
        draft = self._draft(start)
        await self._write([draft], left, room)
        if draft.error is not None and node is self.root:
            raise draft.error
        return next(iter(await self._children([draft])), node)

    async def answer(self, node: Node, reason: str, votes: Mapping[str, int] = {}, *, decided: bool = True) -> Answer:
        """Emit the solution of a leaf; of an open node, finish it first. `decided`: no limit cut the search short."""
        if not node.terminal:
            start, node = node, await self.finish(node)
            reason = f"no proposal was complete; {reason}" + (", written to the end" if node is not start else "")
        over = self.ended or (None if decided else self.over)
        why = "the loss of its reward model" if over == REWARDS else f"its limit of {over}"
        reason = f"{reason}; {self.spent}" + (f"; stopped by {why}" if over else "")
        await self.emit(Event("winner", None, {"node": node.id, "reason": reason}))
        transcript = self.transcript(node)
        for piece in transcript.take():
            await self.emit(piece)
        whole = node.terminal or node.finish == "repetition"
        finish: Finish = node.finish if whole else self.ended or "length"
        stopped_by: StoppedBy = "all_done" if over is None else "error" if over == REWARDS else "budget"
        stopped_by = STOPPED_BY.get(self.ended or finish, stopped_by)
        return Answer(tuple(transcript.tokens), finish, node.id, stopped_by, reason, votes, tuple(self.warnings))

    def transcript(self, node: Node) -> Transcript:
        """The solution that ends in `node`, labelled."""
        transcript = Transcript(self.engine.info(), self.task.phase)
        for each in node.line:
            transcript.push(each.own)
        transcript.push(Delta(finish=node.finish))
        return transcript

    def _drafts(self, counts: Mapping[Node, int], left: int) -> list[Draft]:
        if self.task.sampling.greedy and max(counts.values(), default=0) > 1:
            self.warn(GREEDY)
            counts = dict.fromkeys(counts, 1)
        parents = [node for node, number in counts.items() for _ in range(number)]
        # Every proposal may cost a pass of the scorer.
        most = left if self.limits.passes is None else min(left, self.limits.passes - self.spent.passes)
        self.curtailed = self.curtailed or len(parents) > most
        return [self._draft(node) for node in parents[:most]]

    def _draft(self, node: Node) -> Draft:
        index, number = node.proposed, next(self._numbers)
        node.proposed += 1
        return Draft(node, successor(node.seed, index), number, number if index else node.chain)

    async def _write(self, drafts: Sequence[Draft], total: int, room: int | None = None) -> None:
        paths = {draft.parent: draft.parent.tokens for draft in drafts}

        async def write(draft: Draft) -> None:
            last = room is not None or draft.parent.depth + 1 >= self.limits.depth
            allowance = Allowance(None if last else self.limits.step, total, room)
            await self._writer.write(draft, paths[draft.parent], allowance)

        try:
            await together(write, drafts)
        finally:
            self.spent.tokens += sum(draft.generated for draft in drafts)

    async def _children(self, drafts: Sequence[Draft]) -> list[Node]:
        kept: dict[tuple[Node, str, bool, bool], Node] = {}
        for draft in drafts:
            if draft.finish in {"ceiling", "deadline"}:
                self.ended = draft.finish
            if draft.error is not None:
                self.warn(f"a proposal failed: {draft.error}")
                await self.emit(Event("error", None, {"node": draft.parent.id, "message": str(draft.error)}))
            elif (node := self._node(draft)) is not None:
                told = {"node": node.id, "parent": draft.parent.id, "depth": node.depth, "tokens": len(draft.tokens)}
                await self.emit(Event("node.created", node.chain, told))
                first = kept.setdefault((draft.parent, node.text, node.terminal, node.open), node)
                if first is not node:
                    first.count += 1
                    await self.prune(node, "duplicate")
        self.nodes += kept.values()
        return list(kept.values())

    def _node(self, draft: Draft) -> Node | None:
        """The node of a draft; None when nothing was written, or nothing but white space of an unfinished solution."""
        parent, size, text = draft.parent, len(draft.tokens), self.engine.decode(draft.tokens)
        steps = solution_steps(text) if text.strip() else ()
        if not size or (not steps and not draft.terminal and draft.finish == "stop"):
            return None
        return Node(
            draft.number,
            parent,
            draft.seed,
            draft.own,
            steps,
            parent.length + size,
            0 if draft.dead else parent.left - size,
            draft.terminal,
            draft.finish,
            chain=draft.chain,
        )

    async def prune(self, node: Node, reason: str) -> None:
        """Tell that a node is given up."""
        await self.emit(Event("node.pruned", None, {"node": node.id, "reason": reason}))

    def warn(self, text: str) -> None:
        """Say something once."""
        if text not in self.warnings:
            self.warnings.append(text)
