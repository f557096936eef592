import asyncio, random
import pytest
from chatserve.errors import ServiceError
from chatserve.protocol.codec import from_wire
from chatserve.sessions.limits import SessionLimits
from chatserve.storage.session_store import StorageUnavailable
from tests.sessions.conftest import *
from tests.sessions.fakes import FakeEngine

class Chaos:
    def __init__(self, store, rate): self._s=store; self.rate=rate; self.dead=asyncio.Event()
    def __getattr__(self, name):
        call=getattr(self._s,name)
        async def f(*a,**k):
            if self.dead.is_set(): await asyncio.Event().wait()
            x=random.random()
            if x<self.rate: raise StorageUnavailable("before")
            r=await call(*a,**k)
            if self.dead.is_set(): await asyncio.Event().wait()
            if x>1-self.rate: raise StorageUnavailable("after")
            return r
        return f

@pytest.mark.parametrize("seed", range(12))
async def test_chaos(stage, seed):
    random.seed(seed)
    limits=SessionLimits(delta_interval_s=0.001, store_retry_s=0.002, requeue_delay_s=0.002, cancel_grace_s=0.3, max_idle_sessions=3, tail_entries=4)
    lives=[]
    async def boot():
        s=SessionStore(stage.redis, f"i{len(stage.stores)}", durable=True); stage.stores.append(s)
        c=Chaos(s,0.0)
        chat=await stage.start(FakeEngine(pseudo_random_token,pace_s=0.001), c, limits)
        c.rate=0.15
        lives.append(c)
        return chat
    cur={"chat":await boot()}
    async def retry(fn):
        while True:
            try: return await asyncio.wait_for(fn(), 5)
            except (ServiceError, TimeoutError) as e:
                if getattr(e,"code","") in ("message_not_found","invalid_value"): raise
                await asyncio.sleep(0.01)
    async def person(i):
        cmd_c=command("session.create")
        v,_=await retry(lambda: cur["chat"].manager.create_session("t",cmd_c))
        sid=v["id"]; out=[]
        for t in range(4):
            c=command("response.create",session_id=sid,input=f"{i} {t}",max_output_tokens=random.randrange(1,25),ignore_eos=True)
            a=await retry(lambda: cur["chat"].manager.create_response("t",c))
            if random.random()<.3:
                await asyncio.sleep(random.random()*.02)
                await retry(lambda: cur["chat"].manager.cancel_response("t",sid,a.response_id))
            while True:
                st=await retry(lambda: cur["chat"].manager.get_session("t",sid))
                if st["active_response"] is None: break
                await asyncio.sleep(0.005)
            out.append(a.response_id)
        return sid,out
    async def killer():
        for _ in range(3):
            await asyncio.sleep(0.25)
            lives[-1].dead.set()
            cur["chat"]=await boot()
    k=asyncio.create_task(killer())
    res=await asyncio.gather(*(person(i) for i in range(12)))
    await k
    for sid,out in res:
        log=await stage.stores[-1].read_log(sid,0,100000)
        evs=[from_wire(e.wire) for e in log]
        assert [e["seq"] for e in evs]==list(range(1,len(evs)+1))
        terms=[e["response"]["id"] for e in evs if e["type"] in TERMINAL]
        assert terms==out, (terms,out)
        text={}
        for e in evs:
            if "offset" in e: assert e["offset"]==len(text.get(e["response_id"],"")), e
            if "delta" in e: text[e["response_id"]]=text.get(e["response_id"],"")+e["delta"]
            if e["type"].endswith("done"): assert e["text"]==text.get(e["response_id"],"")
        assert sum(e["type"]=="message.created" for e in evs)==4
