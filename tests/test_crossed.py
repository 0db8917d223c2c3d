"""The part of a table that the suite takes."""

from tests.crossed import crossed


def test_each_value_comes_up_and_the_long_run_has_all() -> None:
    letters, numbers, flags = "abcdefgh", [1, 2, 3], [True, False]
    all_ = crossed(letters, numbers, flags)
    assert {one.values for one in all_} == {
        (a, b, c) for a in letters for b in numbers for c in flags
    }
    suite = [one.values for one in all_ if not one.marks]
    assert len(suite) == 8
    for column, axis in enumerate((letters, numbers, flags)):
        assert {values[column] for values in suite} == set(axis)
    assert len({values[1:] for values in suite}) > 3  # they do not go in step
    assert all(mark.name == "soak" for one in all_ for mark in one.marks)
    assert [one.values for one in crossed(letters, numbers, flags)] == [one.values for one in all_]
