"""The recipe of a round: chosen and stored when the round begins, and not changed afterwards."""

from feedback import rounds
from flows.context import Context
from flows.recipe_files import load_recipe
from flows.round.run_model import RoundUnfit
from yuan.recipe import Recipe


def settle_recipe(context: Context, round_id: str) -> Recipe:
    """Return the round's recipe with the values that the round replaces; the first call reads and stores it.

    Raises:
        RoundUnfit: if there is no such recipe, or it breaks a rule or contradicts the round's values.
    """
    with context.sessions() as session:
        training_round = rounds.find_round(session, round_id)
        if training_round.recipe is not None:
            return rounds.read_recipe(training_round)[1]
        parameters = rounds.read_parameters(training_round)
    name = parameters.recipe or context.settings.recipe
    try:
        recipe = parameters.apply_to(load_recipe(context.settings.home, name), name)
    except ValueError as error:  # of the operator's file and values, which hold no user data
        raise RoundUnfit(str(error)) from None
    with context.sessions.begin() as session:
        return rounds.get_or_store_recipe(session, round_id, name, recipe)[1]
