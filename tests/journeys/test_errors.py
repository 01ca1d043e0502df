from journeys.errors import JourneyDataError


def test_error_says_file_row_and_column() -> None:
    error = JourneyDataError("touchpoints.csv", "not ISO-8601", row=17, column="time")
    assert str(error) == 'touchpoints.csv, row 17, column "time": not ISO-8601'
    assert str(JourneyDataError("t.csv", "has no rows")) == "t.csv: has no rows"
