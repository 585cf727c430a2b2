import threading

import pytest

from ragjax.refresh.ahead import Ahead


def test_work_goes_on_in_another_thread_and_its_result_is_fetched_once():
    ahead = Ahead()
    ahead.submit(threading.get_ident)
    assert ahead.pending and ahead.look() != threading.get_ident()
    assert ahead.result() != threading.get_ident() and not ahead.pending
    with pytest.raises(RuntimeError, match="Nothing"):
        ahead.result()
    ahead.close()


def test_work_runs_while_the_caller_does_something_else():
    ahead, begun, go_on = Ahead(), threading.Event(), threading.Event()

    def work():
        begun.set()
        assert go_on.wait(10)
        return 3

    ahead.submit(work)
    assert begun.wait(10)  # before anybody asked for the result
    go_on.set()
    assert ahead.result() == 3
    ahead.close()


def test_an_error_comes_with_the_result_and_leaves_room_for_more():
    ahead = Ahead()
    ahead.submit(lambda: 1 // 0)
    assert ahead.look() is None
    with pytest.raises(ZeroDivisionError):
        ahead.result()
    ahead.submit(lambda: 5)
    assert ahead.result() == 5
    ahead.close()


def test_a_second_piece_of_work_waits_for_the_first_to_be_fetched():
    ahead = Ahead()
    ahead.submit(lambda: 1)
    with pytest.raises(RuntimeError, match="not fetched"):
        ahead.submit(lambda: 2)
    ahead.close()
    assert not ahead.pending
