"""Several clients of one round trained together: each step is one pass of all their batches over the shared backbone."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fedara_flwr.adapters.learner import Learner
from fedara_flwr.adapters.stack import Stack, loaded
from fedara_flwr.client.capacity import clock
from fedara_flwr.client.step import backward_together
from fedara_flwr.client.train import Job, Trainee, make_optimizer
from fedara_flwr.model.parts import of_backbone
from fedara_flwr.tasks.base import Encoded
from fedara_flwr.wire.plan import TrainPlan, Update


def allows(plan: TrainPlan) -> bool:
    """Whether clients with this plan can be trained together.

    Not with a trained or changed backbone, which would be another one for each; not with dropout, whose draws would be shared;
    not with `batch_tokens`, which bounds what one pass takes.
    """
    return (
        not of_backbone(plan.trained | plan.carries)
        and not plan.train.dropout
        and not plan.train.batch_tokens
        and not plan.kept
    )


def train_together(learner: Learner, jobs: Sequence[Job]) -> list[Update | Exception]:
    """Run one round of several simulated clients; of each what `train` returns or raises, to float tolerance.

    A step's batches are padded to the longest text and the largest number of rows among the clients. `tokens` and what follows
    from it count each client's own rows, as if it were alone; of the seconds each has an equal share.

    Args:
        jobs: with one plan, which `allows` this, and with the same number of steps.
    """
    began, plan, adapted = time.perf_counter(), jobs[0].plan, learner.adapted
    trainees, values = [], []
    for job in jobs:
        trainees.append(Trainee(learner, job, simulated=True))
        values.append(loaded(adapted))
    stack = Stack(adapted, values)
    for i, trainee in enumerate(trainees):
        stack.show(i)
        trainee.begin()
    optimizer, scheduler = make_optimizer(plan, stack.parameters)
    adapted.model.train(False)
    started = clock(adapted.device)
    for step in range(len(trainees[0].steps)):
        rows = [trainee.steps[step].tolist() for trainee in trainees]
        optimizer.zero_grad(set_to_none=False)  # what the stack shows are views of them
        batch = learner.batch(*_joined(jobs, rows))
        losses, seconds = backward_together(
            learner, stack, batch, [len(own) for own in rows], [trainee.shift for trainee in trainees]
        )
        for i, (trainee, own) in enumerate(zip(trainees, rows, strict=True)):
            stack.show(i)
            trainee.losses.append(losses[i])
            trainee.spent.rows += len(own)
            trainee.spent.tokens += len(own) * max(trainee.lengths[row] for row in own)
            for name, value in seconds.items():
                trainee.spent.seconds[name] += value / len(jobs)
            for term in trainee.terms.values():
                if (penalty := term.penalty()) is not None and penalty.requires_grad:
                    penalty.backward()
            trainee.before_update()
        optimizer.step()
        scheduler.step()
        for i, trainee in enumerate(trainees):
            stack.show(i)
            trainee.after_update()
    trained = (clock(adapted.device) - started) / len(jobs)
    updates: list[Update | Exception] = []
    for i, trainee in enumerate(trainees):
        stack.show(i)
        try:
            updates.append(trainee.update((started - began) / len(jobs), trained))
        except Exception as error:  # as `train` would: that client's failure alone
            updates.append(error)
    return updates


def _joined(jobs: Sequence[Job], rows: Sequence[list[int]]) -> tuple[Encoded, range]:
    """Each client's rows in turn, as many of every client: of one that has fewer, the last again."""
    most = max(len(own) for own in rows)
    chosen = [(job.data.train, row) for job, own in zip(jobs, rows, strict=True) for row in own + own[-1:] * (most - len(own))]
    return Encoded([data.ids[row] for data, row in chosen], [data.labels[row] for data, row in chosen]), range(len(chosen))
