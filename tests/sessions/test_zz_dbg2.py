import asyncio, pytest, collections
from tests.sessions.test_chaos import World, ServiceError
import tests.sessions.test_chaos as tc
LAST={}
async def insist(self, work):
    while True:
        try:
            return await asyncio.wait_for(work(self.chat), 0.5)
        except (ServiceError, TimeoutError) as e:
            LAST[asyncio.current_task().get_name()]=repr(e)
            await asyncio.sleep(0.005)
@pytest.mark.parametrize("seed", range(1000,1120))
async def test_dbg(stage, seed, monkeypatch):
    monkeypatch.setattr(tc.World,"insist",insist); LAST.clear()
    world=World(stage, seed)
    import tests.sessions.conftest
    orig=stage.line
    def line():
        l=orig(); type(l).__setattr__; return l
    await world.begin_life()
    dying=asyncio.create_task(world.die_now_and_then())
    people=[asyncio.create_task(world.talk(p),name=f"p{p}") for p in range(10)]
    done,pending=await asyncio.wait(people,timeout=6)
    if pending:
        import sys, faulthandler; sys.stdout=open("/tmp/dbg.out","w"); print("PENDING",[t.get_name() for t in pending],"dying",dying)
        for t in pending:
            print(t.get_name(), LAST.get(t.get_name()))
            t.print_stack()
        m=world.chat.manager
        print("running",m.num_running,"mending",m._keeper._mending,"loading",m._registry._loading, "line", world._line.cut, world._line.failure_rate)
        for live in m._registry:
            print(live.id, live.meta.active and live.meta.active["response_id"], live.turn, live.num_users, live.in_doubt, live.lock, live._write_lock, live._retired, live.tail.head_seq)
            if live.turn: print(vars(live.turn)); live.turn._task.print_stack(); live.turn._writer.task.print_stack(); print(live.turn._consuming); live.turn._consuming and live.turn._consuming.print_stack()
        for t in asyncio.all_tasks():
            print("TASK",t.get_name(), t)
        sys.stdout.flush(); import os; os._exit(3)
    await dying
