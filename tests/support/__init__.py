"""What the tests are built from: real servers, real workers, and a broken network."""

from tests.support.lag import Lag
from tests.support.processes import death_of, is_alive
from tests.support.proxy import Monitor, MonitoredCommand, Proxy
from tests.support.servers import RabbitMQServer
from tests.support.wait import wait_until
from tests.support.workers import WorkerProcess

__all__ = [
    "Lag",
    "Monitor",
    "MonitoredCommand",
    "Proxy",
    "RabbitMQServer",
    "WorkerProcess",
    "death_of",
    "is_alive",
    "wait_until",
]
