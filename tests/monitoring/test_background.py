import threading
import time

import pytest

from moetrain.monitoring.background import BackgroundWorker


def test_results_come_in_the_order_they_were_asked_for():
    work = BackgroundWorker()
    for number in range(12):
        work.submit(lambda n: time.sleep(0.002 * (n % 3)) or n, number)
    assert [done.value for done in work.results(wait=True)] == list(range(12))
    assert work.results() == []
    work.close()


def test_a_full_queue_makes_the_caller_wait_and_nothing_else_does():
    work, release, begun = BackgroundWorker(), threading.Event(), []
    for number in range(4):
        work.submit(lambda n: begun.append(n) or release.wait(5), number)
    assert work.results() == []  # nothing is done, and asking does not wait
    fifth = threading.Thread(target=work.submit, args=(begun.append, 4))
    fifth.start()
    fifth.join(0.05)
    assert fifth.is_alive()  # four are unfinished
    release.set()
    fifth.join(5)
    assert not fifth.is_alive()
    work.results(wait=True)
    assert begun == [0, 1, 2, 3, 4]
    work.close()


def test_an_error_is_raised_where_results_are_taken_and_costs_no_other_result():
    work = BackgroundWorker()
    work.submit(lambda: 1 / 0)
    work.submit(lambda: 2)
    with pytest.raises(ZeroDivisionError):
        work.results(wait=True)
    assert [done.value for done in work.results(wait=True)] == [2]
    work.close()


def test_a_result_tells_the_time_of_the_thread():
    work = BackgroundWorker()
    work.submit(lambda: sum(range(2_000_000)))
    work.submit(time.sleep, 0.1)
    busy, asleep = (done.seconds for done in work.results(wait=True))
    assert busy > asleep
    assert asleep < 0.05  # sleeping takes no processor
    work.close()


def test_without_a_thread_results_are_there_at_once_and_their_time_is_the_callers():
    work, where = BackgroundWorker(threaded=False), []
    work.submit(lambda: where.append(threading.current_thread()))
    assert where == [threading.current_thread()]
    assert [(done.value, done.seconds) for done in work.results()] == [(None, 0.0)]
    work.submit(lambda: 1 / 0)
    work.submit(lambda: 3)
    with pytest.raises(ZeroDivisionError):
        work.results()
    assert [done.value for done in work.results()] == [3]
    work.close()
