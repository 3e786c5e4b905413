"""moesaic.serve.schedule.waiting: turns."""

from moesaic.serve.schedule.waiting import Job, Waiting


def test_more_important_first_then_those_that_had_begun_then_clients_in_turn() -> None:
    waiting = Waiting()
    jobs = [Job(1, [], 1, "a"), Job(2, [], 1, "a"), Job(3, [], 1, "b"), Job(4, [], 0, "a"), Job(5, [], 1, "c")]
    for job in jobs[:4]:
        waiting.add(job)
    waiting.resume(jobs[4])
    assert waiting.priority == 0
    assert [job.number for job in waiting] == [4, 5, 1, 3, 2]
    waiting.remove(jobs[0])
    assert [job.number for job in waiting] == [4, 5, 3, 2]
    for job in jobs[1:]:
        waiting.remove(job)
    assert (len(waiting), list(waiting)) == (0, [])


def test_a_newcomer_goes_behind_those_who_wait() -> None:
    waiting = Waiting()
    patient = Job(0, [], 0, "patient")
    waiting.add(Job(1, [], 0, "busy"))
    waiting.add(patient)
    turns = []
    for number in range(2, 5):
        turns.append(next(iter(waiting)))
        waiting.remove(turns[-1])
        waiting.add(Job(number, [], 0, f"new {number}"))
    assert turns[1] is patient
