"""How messages name a parameter."""


def name_of(group, group_index, index):
    """A parameter as errors name it: 'parameter 3 of group 0', and its name where it has one."""
    names = group.get("param_names") or []
    return f"parameter {index} of group {group_index}" + (f" ('{names[index]}')" if index < len(names) else "")
